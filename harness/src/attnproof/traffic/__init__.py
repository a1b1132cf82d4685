"""What algorithms move between HBM and the chip, and compute: counted, tabulated, drawn."""
