"""Lighthouse Attention in other people's models; each module imports the library that it is named after."""
