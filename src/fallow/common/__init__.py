"""What every package uses: errors, files, progress, metrics."""
