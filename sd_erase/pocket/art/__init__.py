"""The second embedded world: objects and people in eight styles, at 128 x 128 pixels."""
