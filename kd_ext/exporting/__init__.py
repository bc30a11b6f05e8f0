"""A student as something else can read it: a file an idea, each from tensors by name to tensors by name."""
