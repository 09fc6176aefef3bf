"""What ``report`` shows: curves, tables, a figure and a page. Imports no torch."""
