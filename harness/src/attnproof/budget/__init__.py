"""How far from the fp64 answer an honest implementation may be, element by element."""
