"""Around the lesson: corpora, what a long training run needs, pictures."""
