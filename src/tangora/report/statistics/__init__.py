"""From records to judgements: means, intervals, differences, speed and robustness; knows no table and no page."""
