"""The world of the embedded model: moving coloured shapes, drawn and recognised."""
