"""The command line: each command parses, makes one call of one public function, and prints."""
