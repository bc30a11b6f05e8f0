"""From a path to something that answers: a teacher, loaded, checked, asked in its own way, or kept in files."""
