"""Okabe and Ito's colours, for all eyes, and the greys beside them."""

BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
GRAY, PALE, INK = "#6b7280", "#e5e7eb", "#1f2937"
