"""Where models, tokenizers and texts come from: names, the hub, files; and how their files are read and checked."""
