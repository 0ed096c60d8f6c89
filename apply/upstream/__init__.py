"""The bridge to upstream Quamba: its file of scales, in and out, and its own model."""
