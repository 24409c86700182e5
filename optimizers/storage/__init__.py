"""What slots are kept in. A rule sees float32; here is what it looks like in memory, in files and on its way there."""
