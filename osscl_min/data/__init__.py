"""From sound files to batches of samples."""
