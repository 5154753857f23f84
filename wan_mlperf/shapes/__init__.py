"""The embedded model's little world: coloured shapes that move, drawn and recognised."""
