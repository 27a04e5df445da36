"""What fastattn is timed beside: one module for each library."""
