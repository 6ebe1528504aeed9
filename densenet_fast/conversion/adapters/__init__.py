"""One module for each library; imported when a model of that library is converted."""
