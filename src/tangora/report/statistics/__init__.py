"""From records to judgements: means, intervals and differences; knows no table and no page."""
