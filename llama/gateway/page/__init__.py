"""What the page needs from Python: its files, and Markdown as HTML. Knows nothing about requests."""
