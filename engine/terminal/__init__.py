"""What commands share: flags as typed, lines as printed, signals, files that can be written, work that may fail."""
