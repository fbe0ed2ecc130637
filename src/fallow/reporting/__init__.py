"""One HTML file that shows what was found of models: measured in parts, drawn, written."""
