"""Is a model exactly that base with that adapter merged? The checks of `loracle verify`, and their words."""
