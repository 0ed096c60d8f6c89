"""The bridge to upstream Quamba: export and import of its scale files, and its own model."""
