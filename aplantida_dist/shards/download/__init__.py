"""Downloading: pictures that records name and that are not there yet, asked for politely and kept whole or not at all."""
