import socket,os
def bind_restore_socket(d):
    p=os.path.join(d,"lazy-pages.socket")
    try: os.unlink(p)
    except FileNotFoundError: pass
    s=socket.socket(socket.AF_UNIX,socket.SOCK_STREAM); s.bind(p); s.listen(1); s.setblocking(False)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED,1)
    try: s.setsockopt(socket.SOL_SOCKET,76,1)
    except OSError: pass
    return s
