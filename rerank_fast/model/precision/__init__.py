"""What a dtype means on this machine: names, what is multiplied fast, int8."""
