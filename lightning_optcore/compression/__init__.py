"""Techniques that make a trained model smaller and faster: one file a technique."""
