"""Services and programs that show runs side by side, and what they are told."""
