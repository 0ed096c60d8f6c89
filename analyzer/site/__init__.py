"""One site in detail: its strategies side by side, its channels, its scale groups."""
