"""From run records to a table and a plot: records → rows (results.csv) → Markdown table, plot.svg."""
