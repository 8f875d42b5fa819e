"""What a run says of itself: shares of its time, the rows of metrics.jsonl, their tags and summary. No torch."""
