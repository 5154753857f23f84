"""The only place that knows devices: what runs here, and which function each kernel name means."""
