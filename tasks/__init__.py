"""What a DRT is trained and measured on: batches, loss and score of each task side by side, in one file."""
