"""A CrossEncoder behind the interfaces that other libraries ask for; each file needs its
library.
"""
