"""What a network says next: sampling and text in, text out."""
