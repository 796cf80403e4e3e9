"""Readers of source files: folders of images, arrays, video, audio, prompts."""
