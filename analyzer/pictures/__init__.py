"""Pictures: their numbers (`numbers`, without matplotlib), one small file for each drawing, and their style."""
