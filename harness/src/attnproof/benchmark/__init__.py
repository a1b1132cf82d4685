"""How fast targets are, measured side by side: device time, judged outputs, shares of ceilings."""
