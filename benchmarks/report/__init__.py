"""Results as Markdown, as an HTML page, as the README's table."""
