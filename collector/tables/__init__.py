"""From statistics to the files of a run: the rows of its tables, and the folder that holds them."""
