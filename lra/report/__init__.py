"""What was measured, as rows of CSV files, and what is made of the rows: tables, verdicts on published figures, plots."""
