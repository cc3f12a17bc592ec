"""What a run says of itself: records, times, stragglers."""
