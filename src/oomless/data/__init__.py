"""Text and chats in any common form to token blocks, read in bounded memory and resumable at any block."""
