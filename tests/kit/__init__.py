"""What the tests share: real servers, real processes, readers, and the pure checker."""
