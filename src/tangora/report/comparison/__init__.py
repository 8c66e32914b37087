"""A comparison, and one over several tasks, in words, tables, figures and pages."""
