"""A training set whose targets are a teacher's translations: decoded, chosen, kept while it is made, written."""
