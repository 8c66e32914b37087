"""Figures as data, and how they are drawn: as interactive charts and as files."""
