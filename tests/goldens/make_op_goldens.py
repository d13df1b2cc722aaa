"""Cases for `tests/op_cases.rs`: ops of ONNX Runtime's own domain, and what it gives for random operands.

    python make_op_goldens.py FOLDER [ops.zip]

FOLDER then has a folder for each case, and the archive these in place of those of the same names. It has some more: models of
skl2onnx, and ONNX's ops of regions, texts and old forms, made the same way. ONNX Runtime names the ops that it has no CPU
kernel for.
"""
import os, shutil, sys, traceback, zipfile
import numpy as np, onnx
from onnx import helper as h, TensorProto as T, numpy_helper as nh
import onnxruntime as ort
ort.set_default_logger_severity(4)
ROOT=sys.argv[1]
BAD=[]
def vi(name,a):
    if isinstance(a, np.ndarray) and a.dtype.kind in 'OUS':
        return h.make_tensor_value_info(name,T.STRING,list(a.shape))
    return h.make_tensor_value_info(name,h.np_dtype_to_tensor_dtype(a.dtype),list(a.shape))
def case(name, nodes, inputs, outs, opset=17, ms=1, consts=None, ml=None, extra_opsets=(), root=None, dtype_out=None, symbolic=True):
    """nodes: list of NodeProto; inputs: dict name->array; outs: list of names"""
    if not isinstance(nodes,list): nodes=[nodes]
    ops=[h.make_opsetid('',opset)]
    doms={n.domain for n in nodes}
    if 'com.microsoft' in doms: ops.append(h.make_opsetid('com.microsoft',ms))
    if 'ai.onnx.ml' in doms: ops.append(h.make_opsetid('ai.onnx.ml',ml or 3))
    g=h.make_graph(nodes,'g',[vi(k,v) for k,v in inputs.items()],
        [h.make_empty_tensor_value_info(o) for o in outs],
        [nh.from_array(v,k) for k,v in (consts or {}).items()])
    m=h.make_model(g,opset_imports=ops,ir_version=9 if opset<22 else 10)
    try:
        so=ort.SessionOptions(); so.graph_optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        so.log_severity_level=4
        s=ort.InferenceSession(m.SerializeToString(),so,providers=['CPUExecutionProvider'])
        r=s.run(None,inputs)
    except Exception as e:
        BAD.append((name,str(e)[:230])); return None
    d=os.path.join(root or ROOT,name); shutil.rmtree(d,ignore_errors=True); os.makedirs(d+'/test_data_set_0')
    for o,v in zip(g.output,r):
        if isinstance(v,list): 
            continue
        o.type.CopyFrom(vi('x',np.asarray(v)).type)
    m=h.make_model(g,opset_imports=ops,ir_version=9 if opset<22 else 10)
    onnx.save(m,d+'/model.onnx')
    for i,(k,v) in enumerate(inputs.items()):
        open(f'{d}/test_data_set_0/input_{i}.pb','wb').write(nh.from_array(v,k).SerializeToString())
    for i,(k,v) in enumerate(zip(outs,r)):
        open(f'{d}/test_data_set_0/output_{i}.pb','wb').write(nh.from_array(np.asarray(v),k).SerializeToString())
    return r
def fresh(root=ROOT): shutil.rmtree(root,ignore_errors=True); os.makedirs(root)
def report():
    for b in BAD: print('ORT refuses',*b)
def pack(path):
    """The archive with the cases: in order of names, of one date, so that the same cases are the same bytes."""
    files={}
    if os.path.exists(path):
        with zipfile.ZipFile(path) as z: files={n:z.read(n) for n in z.namelist()}
    own=set(os.listdir(ROOT))
    files={n:b for n,b in files.items() if n.split('/')[0] not in own}
    for d,_,names in os.walk(ROOT):
        for n in names:
            with open(os.path.join(d,n),'rb') as file: files[os.path.relpath(os.path.join(d,n),ROOT)]=file.read()
    with zipfile.ZipFile(path,'w',zipfile.ZIP_DEFLATED,compresslevel=9) as z:
        for n in sorted(files): z.writestr(zipfile.ZipInfo(n,(2026,1,1,0,0,0)),files[n],zipfile.ZIP_DEFLATED,9)
rng=np.random.default_rng(0)
def f(*s,scale=1.0): return (rng.standard_normal(s)*scale).astype(np.float32)
def ms(op,ins,outs,**a): return h.make_node(op,ins,outs,domain='com.microsoft',**a)
def node(op,ins,outs,**a): return h.make_node(op,ins,outs,**a)
fresh()
i32=lambda *a: np.array(a,np.int32); i64=lambda *a: np.array(a,np.int64)
B,S,N,D=2,5,2,4; H=N*D
# Attention
def att(name,mask=None,past=None,bias_=True,ab=None,outs=('y',),vsize=None,**kw):
    wh=3*H if vsize is None else 2*H+vsize
    ins={'x':f(B,S,H),'w':f(H,wh,scale=.2)}
    names=['x','w']
    def opt(k,v):
        if v is None: names.append('')
        else: names.append(k); ins[k]=v
    opt('b',f(wh,scale=.2) if bias_ else None); opt('m',mask); opt('p',past); opt('ab',ab)
    while names[-1]=='': names.pop()
    if vsize: kw['qkv_hidden_sizes']=[H,H,vsize]
    c={k:ins.pop(k) for k in ('w','b') if k in ins}
    case('att_'+name,ms('Attention',names,list(outs),num_heads=N,**kw),ins,list(outs),consts=c)
att('plain'); att('nobias',bias_=False); att('causal',unidirectional=1)
att('mask1',i32(3,5)); att('mask2b',i32(3,5,1,0)); att('mask2',np.array([[1,1,1,0,0],[1,1,1,1,1]],np.int32))
att('mask3',(rng.random((B,S,S))>.3).astype(np.int32)); att('mask3c',(rng.random((B,S,S))>.3).astype(np.int32),unidirectional=1)
att('maskc',np.array([[1,1,1,0,0],[0,1,1,1,1]],np.int32),unidirectional=1)
att('mask0',np.array([[0,0,0,0,0],[0,1,1,1,1]],np.int32),mask_filter_value=-1e9)
att('past',past=f(2,B,N,3,D),outs=('y','pr'),unidirectional=1)
att('pastmask',mask=(rng.random((B,S+3))>.3).astype(np.int32),past=f(2,B,N,3,D),outs=('y','pr'))
att('bias',ab=f(B,N,S,S)); att('bias1',ab=f(1,N,S,S),mask=i32(3,5)); att('biasb',ab=f(1,1,S,S))
att('vsize',vsize=6); att('scale',scale=0.3)
# MHA
def mha(name,q=None,k=None,v=None,bias=None,mask=None,ab=None,pk=None,pv=None,outs=('y',),**kw):
    ins={};names=[]
    for n_,x in zip(['q','k','v','b','m','ab','pk','pv'],[q,k,v,bias,mask,ab,pk,pv]):
        if x is None: names.append('')
        else: names.append(n_); ins[n_]=x
    while names[-1]=='': names.pop()
    case('mha_'+name,ms('MultiHeadAttention',names,list(outs),num_heads=N,**kw),ins,list(outs))
L=6
mha('self',f(B,S,H),f(B,S,H),f(B,S,H)); mha('cross',f(B,S,H),f(B,L,H),f(B,L,H)); mha('vsz',f(B,S,H),f(B,L,H),f(B,L,6))
mha('bias',f(B,S,H),f(B,S,H),f(B,S,H),f(3*H)); mha('packed',f(B,S,N,3,D)); mha('packedkv',f(B,S,H),f(B,L,N,2,D))
mha('causal',f(B,S,H),f(B,S,H),f(B,S,H),unidirectional=1); mha('mask1',f(B,S,H),f(B,L,H),f(B,L,H),mask=i32(4,6))
mha('mask2',f(B,S,H),f(B,L,H),f(B,L,H),mask=(rng.random((B,L))>.3).astype(np.int32))
mha('mask3',f(B,S,H),f(B,L,H),f(B,L,H),mask=(rng.random((B,S,L))>.3).astype(np.int32))
mha('ab',f(B,S,H),f(B,L,H),f(B,L,H),ab=f(B,N,S,L)); mha('abmask',f(B,S,H),f(B,L,H),f(B,L,H),ab=f(1,1,S,L),mask=i32(4,6))
mha('past',f(B,S,H),f(B,S,H),f(B,S,H),pk=f(B,N,3,D),pv=f(B,N,3,D),outs=('y','a','b2'))
mha('pastc',f(B,S,H),f(B,S,H),f(B,S,H),pk=f(B,N,3,D),pv=f(B,N,3,D),outs=('y','a','b2'),unidirectional=1)
mha('past1',f(B,1,H),f(B,1,H),f(B,1,H),f(3*H),mask=(rng.random((B,4))>.3).astype(np.int32),pk=f(B,N,3,D),pv=f(B,N,3,D),outs=('y','a','b2'))
mha('kv4',f(B,S,H),f(B,N,L,D),f(B,N,L,D)); mha('kv4b',f(B,S,H),f(B,N,L,D),f(B,N,L,D),bias=f(3*H)); mha('scale',f(B,S,H),f(B,S,H),f(B,S,H),scale=0.25)
# GQA: ONNX Runtime turns heads of 16 elements and more.
D=16; H=N*D
def gqa(name,B=2,S=5,P=0,T=None,K=1,lens=None,packed=False,rot=False,pos=None,ab=None,sink=None,cap=None,norm=False,outs=('y','pk2','pv2'),consts_lens=False,**kw):
    T=T or P+S
    ins={};names=[]
    def put(n_,x):
        if x is None: names.append('')
        else: names.append(n_); ins[n_]=x
    if packed: put('q',f(B,S,(N+2*K)*D)); put('k',None); put('v',None)
    else: put('q',f(B,S,H)); put('k',f(B,S,K*D)); put('v',f(B,S,K*D))
    C=cap or P
    if C: put('pk',f(B,K,C,D)); put('pv',f(B,K,C,D))
    else: put('pk',None); put('pv',None)
    put('sl',np.array(lens if lens is not None else [T-1]*B,np.int32)); put('tot',np.array(T,np.int32))
    rd = rot if rot is True else rot
    if rot:
        n=D//2 if rot is True else rot//2
        put('cos',np.cos(f(64,n))); put('sin',np.sin(f(64,n)))
        kw['do_rotary']=1
    else: put('cos',None); put('sin',None)
    put('pos',pos); put('ab',ab); put('sink',sink)
    put('ks',None); put('vs',None)
    if norm: put('qn',f(D)); put('kn',f(D))
    while names[-1]=='': names.pop()
    c={'tot':ins.pop('tot')}
    if 'cos' in ins: c['cos']=ins.pop('cos'); c['sin']=ins.pop('sin')
    case('gqa_'+name,ms('GroupQueryAttention',names,list(outs),num_heads=N,kv_num_heads=K,**kw),ins,list(outs),consts=c)
gqa('prompt'); gqa('packed',packed=True); gqa('rot',rot=True); gqa('rotint',rot=True,rotary_interleaved=1); gqa('packrot',packed=True,rot=True)
gqa('decode',S=1,P=4); gqa('decoderot',S=1,P=4,rot=True); gqa('b1decode',B=1,S=1,P=4,rot=True,lens=[4])
gqa('lens',S=1,P=6,lens=[6,3],rot=True,cap=10,T=7); gqa('share1',B=1,S=1,P=6,T=7,cap=10,lens=[6]); gqa('chunk',B=1,S=3,P=4,rot=True); gqa('chunkshare',B=1,S=3,T=7,cap=10,lens=[6])
gqa('promptshare',B=2,S=5,T=5,cap=9)
gqa('window',S=6,local_window_size=2); gqa('windowdec',S=1,P=7,local_window_size=3); gqa('windowbig',S=4,local_window_size=10)
gqa('softcap',softcap=2.0); gqa('scale',scale=.4); gqa('smooth',smooth_softmax=1); gqa('sink',sink=f(N)); gqa('ab',ab=f(2,N,5,5)); gqa('ab1',ab=f(1,1,5,5))
gqa('pos',B=2,S=5,rot=True,pos=np.tile(np.arange(5),(2,1)).astype(np.int64)); gqa('norm',norm=True,rot=True); gqa('noncausal',causal=0)
gqa('posdec',B=2,S=1,P=4,rot=True,pos=np.array([[4],[4]],np.int64))
D=4; H=N*D
# rotary
def rot(name,x,pos,n,**kw):
    case('rot_'+name,ms('RotaryEmbedding',['x','p','c','s'],['y'],**kw),{'x':x,'p':pos},['y'],consts={'c':np.cos(f(32,n)),'s':np.sin(f(32,n))})
pos2=np.array([[0,1,2,3,4],[4,5,6,7,8]],np.int64)
rot('3d',f(B,S,H),pos2,2); rot('3di',f(B,S,H),pos2,2,interleaved=1); rot('4d',f(B,N,S,D),pos2,2); rot('off',f(B,S,H),np.array([3],np.int64),2)
rot('part',f(B,S,H),pos2,1,num_heads=N,rotary_embedding_dim=2); rot('scale',f(B,S,H),pos2,2,scale=2.0)
# Norms
def emb(name,seg=True,mask=None,pos=None,outs=('y','m')):
    ins={'ids':rng.integers(0,20,(B,S)).astype(np.int32)};names=['ids']
    c={'w':f(20,H),'p':f(9,H),'g':f(H),'b':f(H)}
    if seg: ins['seg']=rng.integers(0,2,(B,S)).astype(np.int32); c['s']=f(2,H); names+=['seg','w','p','s','g','b']
    else: names+=['','w','p','','g','b']
    if mask is not None: ins['mask']=mask; names.append('mask')
    elif pos is not None: names.append('')
    if pos is not None: ins['pos']=pos; names.append('pos')
    case('emb_'+name,ms('EmbedLayerNormalization',names,list(outs),epsilon=1e-5),ins,list(outs),consts=c)
emb('plain'); emb('noseg',seg=False); emb('mask',mask=np.array([[1,1,1,0,0],[1,1,1,1,1]],np.int32)); emb('sum',outs=('y','m','s2')); emb('pos',pos=np.array([[3,2,1,0,4]]*2,np.int32))
for op,n in (('SkipLayerNormalization',5),('SkipSimplifiedLayerNormalization',4)):
    names=['x','s','g','b','c'][:n] if n==5 else ['x','s','g','c']
    ins={'x':f(B,S,H),'s':f(B,S,H)}; c={'g':f(H),'b':f(H),'c':f(H)}; c={k:c[k] for k in names if k in c}
    case(op+'_full',ms(op,names,['y','','','t']),ins,['y','t'],consts=c)
    case(op+'_min',ms(op,names[:3],['y']),ins,['y'],consts={'g':c['g']})
    case(op+'_bc',ms(op,names[:3],['y']),{'x':f(B,S,H),'s':f(S,H)},['y'],consts={'g':c['g']})
case('gelu',ms('Gelu',['x'],['y']),{'x':f(3,7)},['y']); case('fastgelu',ms('FastGelu',['x','b'],['y']),{'x':f(3,7),'b':f(7)},['y']); case('quick',ms('QuickGelu',['x'],['y'],alpha=1.5),{'x':f(3,7)},['y'])
case('biasgelu',ms('BiasGelu',['x','b'],['y']),{'x':f(3,7),'b':f(7)},['y'])
case('biassplit',ms('BiasSplitGelu',['x','b'],['y']),{'x':f(2,3,8),'b':f(8)},['y']); case('biasadd',ms('BiasAdd',['x','b','s'],['y']),{'x':f(2,3,8),'b':f(8),'s':f(2,3,8)},['y'])
case('biasdrop',ms('BiasDropout',['x','b','s'],['y','m']),{'x':f(2,3,8),'b':f(8),'s':f(2,3,8)},['y'])
case('biassm',ms('BiasSoftmax',['x','b'],['y'],axis=3,is_inner_broadcast=1),{'x':f(2,3,4,8),'b':f(2,1,1,8)},['y'])
case('gn',ms('GroupNorm',['x','g','b'],['y'],groups=2,activation=1),{'x':f(2,3,4,8),'g':f(8),'b':f(8)},['y'])
case('sgn',ms('SkipGroupNorm',['x','g','b','s','c'],['y','t'],groups=2,activation=0),{'x':f(2,3,4,8),'g':f(8),'b':f(8),'s':f(2,8),'c':f(8)},['y','t'])
# Fused
for act,kw in (('Relu',{}),('Tanh',{}),('LeakyRelu',{'activation_alpha':.2}),('HardSigmoid',{'activation_alpha':.3,'activation_beta':.4}),('Sigmoid',{})):
    case('fgemm_'+act,ms('FusedGemm',['a','b','c'],['y'],activation=act,transB=1,alpha=.5,**kw),{'a':f(3,4)},['y'],consts={'b':f(5,4),'c':f(5)})
for ta in (0,1):
  for tb in (0,1):
    for ba in (0,1):
      a=f(2,3,4,4) if ba else f(2,3,4,4)
      b_=f(2,3,4,4)
      case(f'fmm_{ta}{tb}{ba}',ms('FusedMatMul',['a','b'],['y'],transA=ta,transB=tb,alpha=.5),{'a':a,'b':b_},['y'])
case('fmm_batchA',ms('FusedMatMul',['a','b'],['y'],transBatchA=1),{'a':f(4,2,3,5),'b':f(2,3,5,6)},['y'])
case('fmm_batchB',ms('FusedMatMul',['a','b'],['y'],transBatchB=1,transBatchA=1,transA=1),{'a':f(4,2,3,5),'b':f(4,2,3,6)},['y'])
case('fmm_vec',ms('FusedMatMul',['a','b'],['y'],alpha=.5),{'a':f(4),'b':f(4,3)},['y'])
case('fmmact',ms('FusedMatMulActivation',['a','b'],['y'],activation='Relu',alpha=.5,transB=1),{'a':f(2,3,4),'b':f(2,5,4)},['y'])
case('tmm',ms('TransposeMatMul',['a','b'],['y'],transA=1),{'a':f(4,3),'b':f(4,5)},['y'])
case('gemmfg',ms('GemmFastGelu',['a','b','c'],['y']),{'a':f(2,3,4),'b':f(4,5),'c':f(5)},['y'])
case('nhwc',ms('NhwcFusedConv',['x','w','b'],['y'],activation='Relu',pads=[1,1,1,1]),{'x':f(1,6,6,4)},['y'],consts={'w':f(8,4,3,3),'b':f(8)})
case('fconv',ms('FusedConv',['x','w','b','z'],['y'],activation='Relu',pads=[1,1,1,1]),{'x':f(1,4,6,6),'z':f(1,8,6,6)},['y'],consts={'w':f(8,4,3,3),'b':f(8)})
# misc
case('inverse',ms('Inverse',['x'],['y']),{'x':f(3,4,4)},['y']); case('trilu',ms('Trilu',['x'],['y'],upper=0),{'x':f(3,4,4)},['y']); case('expand',ms('ExpandDims',['x','a'],['y']),{'x':f(3,4)},['y'],consts={'a':np.array(-1,np.int32)})
case('unfold',ms('UnfoldTensor',['x'],['y'],dim=1,size=3,step=2),{'x':f(2,8,3)},['y']); case('unfoldl',ms('UnfoldTensor',['x'],['y'],dim=-1,size=2),{'x':f(2,8,3)},['y'])
case('cdist',ms('CDist',['a','b'],['y'],metric='euclidean'),{'a':f(4,3),'b':f(5,3)},['y']); case('cdist2',ms('CDist',['a','b'],['y']),{'a':f(4,3),'b':f(5,3)},['y'])
for mode in ('bilinear','nearest'):
  for cs in ((3,4),(1,1),(5,5)):
    case(f'crop_{mode}{cs[0]}',ms('CropAndResize',['x','r','b','c'],['y'],mode=mode,extrapolation_value=7.),{'x':f(2,3,6,7),'r':np.array([[0,0,1,1],[.1,.2,.7,.9],[-.2,.3,1.2,.5]],np.float32),'b':i32(0,1,1)},['y'],consts={'c':i32(*cs)})
case('dtw',ms('DynamicTimeWarping',['x'],['y']),{'x':f(5,7)},['y']); case('dtw3',ms('DynamicTimeWarping',['x'],['y']),{'x':f(1,9,6)},['y'])
case('unique',ms('Unique',['x'],['y','i','c']),{'x':np.array([3,1,3,2,1,9],np.float32)},['y','i','c'])
case('ctdp',ms('ConvTransposeWithDynamicPads',['x','w','p'],['y'],strides=[2,2]),{'x':f(1,3,5,5)},['y'],consts={'w':f(3,2,3,3),'p':i64(1,0,1,1)})
case('mspad',ms('Pad',['x','p'],['y'],mode='reflect'),{'x':f(3,4)},['y'],consts={'p':i64(1,0,1,2)})
for m_ in ('bilinear','nearest','bicubic'): case('gs_'+m_,ms('GridSample',['x','g'],['y'],mode=m_),{'x':f(1,2,4,5),'g':f(1,3,3,2)},['y'])
case('rfft',ms('Rfft',['x'],['y'],signal_ndim=1),{'x':f(2,8)},['y']); case('irfft',ms('Irfft',['x'],['y'],signal_ndim=1),{'x':f(2,5,2)},['y'])
case('rpb',ms('RelativePositionBias',['t','q','k'],['y'],max_distance=16,is_bidirectional=1),{'t':f(8,4)},['y'],consts={'q':np.array(6,np.int64),'k':np.array(6,np.int64)})
case('simpl',node('SimplifiedLayerNormalization',['x','g'],['y'],epsilon=1e-5),{'x':f(2,3,8)},['y'],consts={'g':f(8)})
# Quantized attention: codes of both kinds, scales of all and of columns, masks, a past.
def coded(*s,dtype=np.uint8): 
    lo,hi=(0,256) if dtype==np.uint8 else (-128,128)
    return rng.integers(lo,hi,s).astype(dtype)
u8=lambda v: np.array(v,np.uint8)
def steps(n,low=.005,high=.02): return rng.uniform(low,high,n).astype(np.float32)
def qatt(name,wd=np.uint8,columns=False,zeros=True,mask=None,past=None,outs=('y',),N=N,H=H,**kw):
    ins={'x':coded(B,S,H)}
    c={'w':coded(H,3*H,dtype=wd),'b':f(3*H,scale=.2),'xs':np.array(.02,np.float32),'ws':steps(3*H) if columns else np.array(.01,np.float32)}
    names=['x','w','b','xs','ws']
    def opt(k,v,to=None):
        if v is None: names.append('')
        else: names.append(k); (ins if to is None else to)[k]=v
    opt('m',mask)
    opt('xz',u8(120) if zeros else None,c)
    opt('wz',(coded(3*H,dtype=wd)//8 if columns else np.array(5,wd)) if zeros else None,c)
    opt('p',past)
    while names[-1]=='': names.pop()
    case('qatt_'+name,ms('QAttention',names,list(outs),num_heads=N,**kw),ins,list(outs),consts=c)
qatt('u8'); qatt('s8',np.int8); qatt('columns',np.int8,columns=True); qatt('nozero',np.int8,zeros=False); qatt('u8columns',columns=True,unidirectional=1)
qatt('mask1',mask=i32(3,5)); qatt('mask2b',mask=i32(3,5,1,0),unidirectional=1); qatt('mask2',np.int8,mask=np.array([[1,1,1,0,0],[1,1,1,1,1]],np.int32))
qatt('mask3',mask=(rng.random((B,S,S))>.3).astype(np.int32),mask_filter_value=-1e6)
qatt('past',np.int8,past=f(2,B,N,3,D),outs=('y','pr'),unidirectional=1)
qatt('pastmask',mask=(rng.random((B,S+3))>.3).astype(np.int32),past=f(2,B,N,3,D),outs=('y','pr'),scale=.3)
qatt('odd',np.int8,columns=True,N=3,H=15)
# Embeddings of codes
def qemb(name,seg=True,mask=None,dtype=np.uint8):
    ins={'ids':rng.integers(0,20,(B,S)).astype(np.int32)}; names=['ids']
    tables={'w':(20,H),'p':(9,H),'s':(2,H),'g':(H,),'b':(H,)}
    if not seg: del tables['s']
    c={}
    for k,s in tables.items():
        c[k]=coded(*s,dtype=dtype); c[k+'s']=np.array(.01+.01*len(c),np.float32); c[k+'z']=np.array(100 if dtype==np.uint8 else -7,dtype)
    if seg: ins['seg']=rng.integers(0,2,(B,S)).astype(np.int32)
    if mask is not None: ins['m']=mask
    all_=['w','p','s','g','b']
    has=lambda k: k if k in c or k in ins else ''
    names+=[has('seg')]+[has(k) for k in all_]+[has('m')]+[has(k+'s') for k in all_]+[has(k+'z') for k in all_]
    case('qemb_'+name,ms('QEmbedLayerNormalization',names,['y','n'],epsilon=1e-5),ins,['y','n'],consts=c)
qemb('plain'); qemb('noseg',seg=False,dtype=np.int8); qemb('mask',mask=np.array([[1,1,1,0,0],[1,1,1,1,1]],np.int32))
# Rows of quantized tables
def gbq(name,rows=11,width=40,bits=4,block=16,zeros=True,idx=np.array([[3,0],[10,-1]],np.int64),scale=np.float32,**kw):
    each=8//bits; blocks=-(-width//block)
    c={'d':coded(rows,-(-width//each)),'s':steps((rows,blocks)).astype(scale)}
    names=['d','i','s']
    if zeros: c['z']=coded(rows,-(-blocks//each)); names.append('z')
    case('gbq_'+name,ms('GatherBlockQuantized',names,['y'],bits=bits,block_size=block,gather_axis=0,quantize_axis=1,**kw),{'i':idx},['y'],consts=c)
gbq('4'); gbq('4nozero',zeros=False,idx=np.array([2,9,2],np.int32)); gbq('8',bits=8); gbq('8half',bits=8,zeros=False,scale=np.float16); gbq('2',bits=2); gbq('one',block=128,idx=np.array(4,np.int64))
def gbq4(name,t,dims=(4,3,20),gather=0,quant=2,block=16,zeros=True,idx=np.array([[2,0],[1,-1]],np.int64),broadcast=None):
    import ml_dtypes
    dtype={T.INT4:ml_dtypes.int4,T.UINT4:ml_dtypes.uint4,T.FLOAT8E4M3FN:ml_dtypes.float8_e4m3fn,T.FLOAT8E5M2:ml_dtypes.float8_e5m2}[t]
    n=int(np.prod(dims)); floats=t in (T.FLOAT8E4M3FN,T.FLOAT8E5M2)
    lo=-8 if t==T.INT4 else 0
    make=lambda s: (f(*s) if floats else rng.integers(lo,lo+16,s)).astype(dtype)
    sd=list(dims); sd[quant]=1 if block==0 else -(-dims[quant]//block)
    if broadcast is not None: sd[broadcast]=1
    c={'d':make(dims),'s':steps(sd)}; names=['d','i','s']
    if zeros: c['z']=make(sd); names.append('z')
    case('gbq_'+name,ms('GatherBlockQuantized',names,['y'],block_size=block,gather_axis=gather,quantize_axis=quant),{'i':idx},['y'],opset=21,consts=c)
gbq4('int4',T.INT4); gbq4('uint4',T.UINT4,gather=1,quant=0,dims=(33,4,2)); gbq4('int4_same',T.INT4,gather=2,quant=2,zeros=False); gbq4('uint4_back',T.UINT4,gather=-1,quant=-2,dims=(2,40,5),zeros=False)
gbq4('fp8',T.FLOAT8E4M3FN,zeros=False); gbq4('fp8_rows',T.FLOAT8E5M2,zeros=False,block=0,broadcast=1); gbq4('fp8_table',T.FLOAT8E4M3FN,zeros=False,block=0,broadcast=0,dims=(5,7),quant=1)
# Weights of 4 bits of floats
def bnb(name,kind,K=48,N_=10,block=16,lead=(2,3),**kw):
    n=K*N_; c={'b':coded(-(-n//2)),'m':steps(-(-n//block),.5,2.)}
    case('bnb_'+name,ms('MatMulBnb4',['a','b','m'],['y'],K=K,N=N_,block_size=block,quant_type=kind,**kw),{'a':f(*lead,K if kw.get('transB',1) else N_)},['y'],consts=c)
bnb('fp4',0); bnb('nf4',1); bnb('nf4_odd',1,K=45,N_=7,block=32); bnb('nf4_big',1,K=64,N_=33,block=64,lead=(1,))
case('mm16',ms('MatMulInteger16',['a','b'],['y']),{'a':rng.integers(-300,300,(2,3,5)).astype(np.int16),'b':rng.integers(-300,300,(5,4)).astype(np.int16)},['y'])
# Pools
def roi(name,pooled,rois,shape=(2,2,9,12),**kw):
    case('maxroi_'+name,node('MaxRoiPool',['x','r'],['y'],pooled_shape=pooled,**kw),{'x':f(*shape),'r':np.array(rois,np.float32)},['y'])
roi('plain',[2,3],[[0,0,0,7,6],[1,2,1,11,8]]); roi('scaled',[3,3],[[0,3,1,30,22],[1,-9,-9,50,40],[1,60,2,70,9]],spatial_scale=.4); roi('small',[3,2],[[0,4,4,4,4],[0,8,8,2,2],[1,2.5,3.5,6.5,4.49]])
roi('f8',[1,1],[[0,1,1,5,5]],shape=(1,1,7,7))
for name,dtype,kw in (('u8',np.uint8,dict(kernel_shape=[2,2],strides=[2,2])),('s8',np.int8,dict(kernel_shape=[3,2],pads=[1,0,1,1],dilations=[2,1])),('ceil',np.uint8,dict(kernel_shape=[3,3],strides=[2,2],ceil_mode=1)),('same',np.int8,dict(kernel_shape=[3,3],strides=[2,1],auto_pad='SAME_UPPER'))):
    case('nhwcpool_'+name,ms('NhwcMaxPool',['x'],['y'],**kw),{'x':coded(2,8,7,3,dtype=dtype)},['y'])
# Gates
case('gated_add',ms('GatedAdd',['x','y','g'],['z']),{'x':f(2,3,8),'y':f(2,3,8),'g':f(2,3,1)},['z'])
for act in ('swish','sigmoid'):
    case('gated_rms_'+act,ms('GatedRMSNorm',['x','s','g'],['y'],activation=act,epsilon=1e-3),{'x':f(2,3,12),'g':f(2,3,12)},['y'],consts={'s':f(4)})
case('gated_rmsh',ms('GatedRMSNorm',['x','s','g'],['y']),{'x':f(2,3,12).astype(np.float16),'g':f(2,3,12).astype(np.float16)},['y'],consts={'s':f(12).astype(np.float16)})
case('silu_alpha',ms('ScaledSiLU',['x'],['y'],alpha=.7),{'x':f(3,7)},['y']); case('silu_scale',ms('ScaledSiLU',['x','s'],['y']),{'x':f(3,7),'s':np.array(1.3,np.float16)},['y'])
case('branch',ms('BranchwiseRMSNorm',['x'],['y']),{'x':f(2,3,2,8)},['y']); case('branch_flat',ms('BranchwiseRMSNorm',['x','s'],['y'],num_branches=4,epsilon=1e-2),{'x':f(2,3,20)},['y'],consts={'s':f(20)})
case('branch_h',ms('BranchwiseRMSNorm',['x','s'],['y']),{'x':f(2,3,2,8)},['y'],consts={'s':f(8)}); case('branch_ch',ms('BranchwiseRMSNorm',['x','s'],['y'],num_branches=2),{'x':f(2,3,16).astype(np.float16)},['y'],consts={'s':f(2,8)})
case('lagate',ms('LinearAttentionGate',['a','d','s','b'],['y','z']),{'a':f(2,3,4),'b':f(2,3,4)},['y','z'],consts={'d':f(4),'s':-np.abs(f(4))})
# Experts
def moe(name,E=4,hid=8,inter=6,tokens=(5,),k=2,biases=True,**kw):
    wide=2 if kw.get('activation_type')=='swiglu' and kw.get('swiglu_fusion') else 1
    n=int(np.prod(tokens)); c={'w1':f(E,wide*inter,hid),'w2':f(E,hid,inter)}; names=['x','r','w1','','w2','']
    if biases: c['b1']=f(E,wide*inter); c['b2']=f(E,hid); names=['x','r','w1','b1','w2','b2']
    while names[-1]=='': names.pop()
    case('moe_'+name,ms('MoE',names,['y'],k=k,**kw),{'x':f(*tokens,hid),'r':f(n,E)},['y'],consts=c)
moe('relu'); moe('gelu',activation_type='gelu',normalize_routing_weights=1,tokens=(2,3)); moe('silu',activation_type='silu',k=1,biases=False); moe('identity',activation_type='identity',k=4)
moe('swiglu',activation_type='swiglu',swiglu_fusion=1,normalize_routing_weights=1); moe('swiglu_limit',activation_type='swiglu',swiglu_fusion=1,swiglu_limit=.9,activation_alpha=1.702,activation_beta=1.,E=5,k=3)
def qmoe(name,bits=4,E=3,hid=16,inter=16,block=0,zeros=False,k=2,tokens=(4,),mixing=False,biases=True,**kw):
    wide=2 if kw.get('activation_type')=='swiglu' else 1
    n=int(np.prod(tokens)); each=8//bits
    c={}; ins={'x':f(*tokens,hid),'r':f(n,E)}
    def layer(i,rows,cols):
        c[f'w{i}']=coded(E,rows,cols//each)
        c[f's{i}']=steps((E,rows,cols//block) if block else (E,rows))/(1 if bits==4 else 16)
        if biases: c[f'b{i}']=f(E,rows)
        if zeros: c[f'z{i}']=coded(E,rows,-(-(cols//block)//each)) if block else coded(E,-(-rows//each))
    layer(1,wide*inter,hid); layer(2,hid,inter)
    if mixing: ins['m']=np.abs(f(n,E))
    has=lambda k_: k_ if k_ in c or k_ in ins else ''
    names=['x','r']+[has(k_) for k_ in ('w1','s1','b1','w2','s2','b2')]+['','','']+[has('z1'),has('z2'),'',has('m')]
    while names[-1]=='': names.pop()
    if block: kw['block_size']=block
    case('qmoe_'+name,ms('QMoE',names,['y'],k=k,expert_weight_bits=bits,**kw),ins,['y'],consts=c)
qmoe('4block',block=16,hid=32,activation_type='silu',normalize_routing_weights=1); qmoe('4zero',zeros=True); qmoe('4blockzero',block=16,hid=32,zeros=True,activation_type='swiglu',swiglu_fusion=1)
qmoe('8zero',bits=8,zeros=True,biases=False); qmoe('mixing',mixing=True,activation_type='gelu'); qmoe('mixnorm',mixing=True,normalize_routing_weights=1,E=5,k=3); qmoe('swiglu',activation_type='swiglu',swiglu_fusion=1,swiglu_limit=.5,activation_alpha=1.702,activation_beta=1.); qmoe('2',bits=2)
# Tokens
def ngram(name,n,ids,V=7): case('ngram_'+name,ms('NGramRepeatBlock',['i','s'],['y'],ngram_size=n),{'i':np.array(ids,np.int64),'s':f(len(ids),V)},['y'])
ngram('2',2,[[1,2,3,1],[4,4,4,4],[0,5,6,2]]); ngram('3',3,[[1,2,3,1,2],[5,5,5,5,5]]); ngram('1',1,[[1,2,6]]); ngram('short',4,[[1,2,1]])
for dtype in (np.int32,np.uint32,np.int64,np.float32,np.float64):
    x=(rng.integers(-2**31,2**31,(3,2))*3).astype(np.int64) if dtype in (np.int64,np.uint64) else (f(3,2)*100 if dtype in (np.float32,np.float64) else rng.integers(0,2**31,(3,2)))
    case('murmur_'+dtype.__name__,ms('MurmurHash3',['x'],['y'],seed=int(rng.integers(0,99)),positive=int(dtype in (np.int32,np.float64))),{'x':x.astype(dtype)},['y'])
case('murmur_text',ms('MurmurHash3',['x'],['y'],seed=5,positive=0),{'x':np.array(['','a','bc','def','quantize','größer'],object)},['y'])
def words(name,V=9,C=4,F=5,k=2,L=6,seqs=None,**kw): case('wce_'+name,ms('WordConvEmbedding',['s','w','b','c'],['y'],**kw),{'s':np.array(seqs,np.int32)},['y'],consts={'w':f(F,1,k,C),'b':f(F),'c':f(V,C)})
words('plain',seqs=[[3,1,4,1,5,0],[8,0,0,0,0,0],[1,2,3,4,5,6]]); words('wide',k=3,seqs=[[3,1,0,0,0,0],[2,0,0,0,0,0]],embedding_size=5,conv_window_size=3,char_embedding_size=4)
def tok(name,x,**kw):
    kw={**dict(mark=0,mincharnum=1,pad_value='#'),**kw}
    case('tok_'+name,ms('Tokenizer',['x'],['y'],**kw),{'x':np.array(x,object)},['y'])
two=['Hello World','I love computer science !']
tok('space',two,separators=[' ']); tok('mark',two,separators=[' '],mark=1); tok('chars',['ab c','größe'],separators=['']); tok('chars_mark',[['ab'],['']],separators=[''],mark=1)
tok('several',['a,b c;;d','x'],separators=[' ',',',';']); tok('min',['a bcd ef ghij'],separators=[' '],mincharnum=3); tok('regex',['a1b22c','zz9'],separators=['[0-9]+']); tok('exp',['abc def1','12 x'],tokenexp='[a-z]+'); tok('exp_dot',['ab c'],tokenexp='.'); tok('exp_min',['a bb ccc'],tokenexp='[a-c]+',mincharnum=2,mark=1); tok('none',['  '],separators=[' '],mark=1); tok('nonechars',['',''],separators=[''],mark=1)
# Angles of three positions
def mrot(name,x,sections,n=4,**kw): case('mrot_'+name,ms('MRotaryEmbedding',['x','p','c','s'],['y'],mrope_section=sections,**kw),{'x':x,'p':rng.integers(0,9,(3,B,S)).astype(np.int64)},['y'],consts={'c':np.cos(f(9,n)),'s':np.sin(f(9,n))})
mrot('3d',f(B,S,16),[2,1,1],num_heads=2); mrot('4d',f(B,2,S,8),[1,2,1],interleaved=1); mrot('inter',f(B,S,24),[2,2,2],n=6,mrope_layout=1,num_heads=2); mrot('part',f(B,S,2*10),[1,1,2],num_heads=2,rotary_embedding_dim=8); mrot('inter4',f(B,2,S,8),[2,1,1],mrope_layout=1)
case('sampleop',ms('SampleOp',['x'],['y']),{'x':f(4,5)},['y'])
report()
if len(sys.argv)>2: pack(sys.argv[2])
