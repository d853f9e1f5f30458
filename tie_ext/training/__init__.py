"""TIE's loop, and `attach` and `explain` for networks that are trained already."""
