"""What is measured, and not part of the product's path."""
