"""A tiny Kandinsky 2.1, trained from scratch on a world of coloured shapes: ``python -m training --help``."""
