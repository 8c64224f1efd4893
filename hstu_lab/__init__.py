"""HSTU Lab: inference optimisation of generative recommenders, in notebooks and in parts you can use on their own."""

__version__ = "0.1.0"
